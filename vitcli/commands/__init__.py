"""The commands of `vit`, one file each or a few that belong together: read, call, print."""
