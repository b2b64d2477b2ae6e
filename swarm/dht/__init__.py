"""Who serves what, and whether to believe it: signed records in a Kademlia table."""
