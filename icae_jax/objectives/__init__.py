"""What the decoder is trained to say behind a memory: target layouts and the loss on their labels."""
