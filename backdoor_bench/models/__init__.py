"""Networks with features(), named blocks and a replaceable head; normalisation is their first layer."""
