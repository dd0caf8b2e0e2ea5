"""What is decided once for a graph at one set of shapes: its programs, and which lengths share them."""
