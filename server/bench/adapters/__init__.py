"""`multilora bench adapters`: what thousands of adapters, loads and replacements cost those who only ask.

Every server here is a real `multilora serve` in a process of its own, and its clients are in the process of the
command. Every answer that is timed is compared with PEFT's.
"""
