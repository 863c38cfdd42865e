"""What `psjax.infer_axes` finds in models that nobody wrote for it."""
