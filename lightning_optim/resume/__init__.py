"""Resume a killed run as if it had not been killed, bit for bit."""
