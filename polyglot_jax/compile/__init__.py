"""Compile a training step for devices that are not here, and read what the compiler says of it.

topology.py makes the devices, hlo.py reads the compiled text, cost.py adds it up, command.py is the verb.
"""
