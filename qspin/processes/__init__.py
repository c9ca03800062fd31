"""Several processes of one launch, and the work dealt to them."""
