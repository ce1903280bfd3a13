"""What is measured, each beside its peers and its physical limit."""
