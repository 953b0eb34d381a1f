"""The rating: turns stored energy per 1,000 queries into stars."""
