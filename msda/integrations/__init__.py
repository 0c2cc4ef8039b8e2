"""Ways to run `msda` inside other libraries' models, one module each, imported on demand."""
