"""Short plain-torch truth for every op: any dtype, any device, differentiable twice, slow."""
