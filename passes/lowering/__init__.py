"""What the inner compiler needs: writes in place, repeated blocks as subgraphs, one program for several lengths."""
