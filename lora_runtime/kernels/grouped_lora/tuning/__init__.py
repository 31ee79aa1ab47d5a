"""Measured tables of block sizes, one JSON file for each device and dtype, made by `multilora tune`.

A device without a table runs on the defaults of `triton_backend/tuning.py`. To add one, run
`multilora tune --base BASE --out DEVICE-DTYPE.json` on it and put the file here.
"""
