"""What a run leaves for people to look at: numbers, pictures, a page."""
