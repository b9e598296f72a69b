"""`vit bench`: how fast training, inference and loading are, beside the same ViT of other libraries."""
