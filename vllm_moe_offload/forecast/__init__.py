"""What requests will use next."""
