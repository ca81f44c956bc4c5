"""One file per cell and kind of attention: fakes and autograd around the native ops, loaded on import."""
