"""The edge runtime: the C sources of the ahead-of-time engine, the bundle runner and their interfaces."""
