"""The public page that tells whether models are healthy, and who keeps them alive."""
