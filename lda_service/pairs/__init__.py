"""Model pairs that travel with the package, so that everything can be tried without a download."""
