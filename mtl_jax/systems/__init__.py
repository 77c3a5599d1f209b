"""Published methods, one module each: a SPEC and `build(config)`."""
