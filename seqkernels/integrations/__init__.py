"""Our kernels behind the interfaces of other libraries; each module needs its library to be imported."""
