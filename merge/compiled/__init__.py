"""Hot loops of a few operators in C over stored bytes, without torch; what has no compiled form is made by torch."""
