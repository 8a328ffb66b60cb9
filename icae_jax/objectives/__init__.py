"""What the decoder is trained to say behind a memory: targets, and the loss on their labels."""
