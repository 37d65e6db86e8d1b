"""Figures drawn for people: PNG files, and one HTML page that needs no network."""
