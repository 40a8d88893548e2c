"""Measurements behind the README's claims, each repeated by one command."""
