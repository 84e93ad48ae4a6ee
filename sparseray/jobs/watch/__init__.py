"""What people look at: figures, pictures, reports of a run."""
