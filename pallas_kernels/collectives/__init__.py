"""Where the devices of a mesh's axis meet: parts are added, or parts of attention merged."""
