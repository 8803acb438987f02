"""Ways to start processes: one file each. To add one, see docs/adding-a-launcher.md."""
