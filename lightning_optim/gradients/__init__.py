"""What happens between backward and step."""
