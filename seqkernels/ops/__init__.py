"""One file per cell: fakes and autograd around the native ops. Importing one loads the native library."""
