"""Trained weights as the start of another task."""

from __future__ import annotations

from vitcli.checkpoint import Trained, check_fit
from vitcli.errors import CheckpointError
from vitcli.model import ViTConfig
from vitcli.model.vit import ViT


def start_from(trained: Trained, config: ViTConfig, classes: int, image_size: tuple[int, int]) -> tuple[ViT, list[str]]:
    """A model for another task that starts from trained weights: new zero head, patches resized and position table
    stretched where `config` and `image_size` want others, `pre_logits` kept where `config` has it.

    Returns the model and a line for each thing that was not taken over as it is. Raises CheckpointError where the
    architectures differ otherwise.
    """
    from vitcli.model.position import resize_table
    from vitcli.model.stem import resize_patches

    model = config.build(classes, image_size)
    fresh, old = model.state_dict(), trained.model.state_dict()
    notes = []

    before, after = trained.config.patch, config.patch
    if before != after:
        if config.stem or trained.config.stem:
            raise CheckpointError(f"{trained.origin}: a hybrid's patches are not resized", f"set model.patch={before}")
        old = {**old, "patch_embed.proj.weight": resize_patches(old["patch_embed.proj.weight"], after)}
        notes.append(f"patches resized {before}x{before} -> {after}x{after} (FlexiViT's pseudo-inverse)")
    grids = trained.config.grid(trained.image_size), config.grid(image_size)
    if grids[0] != grids[1] and "pos_embed" in old:
        table = resize_table(old["pos_embed"], trained.config.posemb_prefix, *grids, config.posemb_resize)
        old = {**old, "pos_embed": table}
        shown = " -> ".join("x".join(map(str, grid)) for grid in grids)
        notes.append(f"position table stretched {shown} ({config.posemb_resize})")

    keep = "pre_logits.fc.weight" in old and config.representation_size is not None
    taken = {
        name: tensor
        for name, tensor in old.items()
        if not name.startswith(("head.", "head_dist.")) and (keep or not name.startswith("pre_logits."))
    }
    if trained.model.classes:
        outputs = f"{len(trained.classes)} classes" if trained.classes else f"{trained.model.classes} features"
        dropped = ", with pre_logits" if "pre_logits.fc.weight" in old.keys() - taken.keys() else ""
        notes.append(f"old head dropped ({outputs}{dropped})" + (", pre_logits kept" if keep else ""))
    notes.append(f"new zero head for {classes} classes")

    heads = {name: tensor for name, tensor in fresh.items() if name.startswith(("head.", "head_dist.", "pre_logits."))}
    state = heads | taken
    check_fit(fresh, state, trained.origin)
    model.load_state_dict(state)
    return model, notes
