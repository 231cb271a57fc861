"""Images: where they come from, and how views of them are drawn."""
