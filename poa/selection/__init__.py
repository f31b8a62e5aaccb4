"""Choosing a subnet: what each costs on a device, what it is worth, and which are worth their cost."""
