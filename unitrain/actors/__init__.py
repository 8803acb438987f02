"""Groups of Ray actors: a cluster to put them on, waits that end and name who is late, and acts on all of them."""
