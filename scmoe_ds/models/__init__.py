"""Transformers whose blocks say where their shortcut is taken; everything about time is in scmoe_ds.overlap."""
