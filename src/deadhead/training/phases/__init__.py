"""One phase of training, and how units are chosen."""
