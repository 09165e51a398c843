"""Speed: `python -m jaxsd.bench step|recipe|patches`."""
