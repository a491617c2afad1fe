"""Compile a training or a decode step for devices that are not here, and read what the compiler says of it.

topology.py makes the devices, hlo.py reads the compiled text, cost.py adds it up, timeline.py runs it in its order with
memory as a queue; command.py and decode.py are the verb.
"""
