"""What models are: their dimensions as data, and the one decoder that runs them."""
