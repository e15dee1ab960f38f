"""The Image Transformer of Parmar et al. 2018 (arXiv:1802.05751) as loops: one value, one layer, one head, one key."""


def block_order(height: int, width: int, channels: int, block_height: int, block_width: int) -> list[tuple]:
    """(row, column, channel) in the order of generation: blocks in raster order, inside them pixels in raster order."""
    order = []
    for top in range(0, height, block_height):
        for left in range(0, width, block_width):
            for row in range(top, min(top + block_height, height)):
                for column in range(left, min(left + block_width, width)):
                    for channel in range(channels):
                        order.append((row, column, channel))
    return order
