"""Attacks on class maps: models that decide as before and show what the attacker likes."""
