"Find, compare, look at and use subnetworks of pretrained transformers."
__version__ = "0.1.0"
