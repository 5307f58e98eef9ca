"""What people look at: the head map as a picture and as characters, and the table of a run's stages."""
