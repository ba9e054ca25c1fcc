"""weight_sync room."""
