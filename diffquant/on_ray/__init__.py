"""More machines than one, through Ray: the lines of a file, and the server.

Ray is imported where it is needed and nowhere else; its processes need diffquant too, and the weights
at the same path or on the hub.
"""
