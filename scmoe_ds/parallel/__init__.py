"""Who computes: process groups and agreement between ranks."""
