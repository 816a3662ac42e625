"""The demo: an LSTM on handwritten digits at several batch sizes."""
