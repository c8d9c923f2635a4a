"""The loops: one for NRT, one for SFT, and what both rest on."""
