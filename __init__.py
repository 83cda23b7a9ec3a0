"""viPolyQwen: one 1024-d vector for text, images, audio and mixes of them."""
