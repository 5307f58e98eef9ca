'use strict';
// The head map: one table for heads and one for blocks, a button for each.

class HeadMap {
  /**
   * @param {HTMLElement} place what it is drawn into
   * @param {(layer: object, index: number) => void} onClick called with a layer and the index of the head clicked
   * @param {boolean} toggles whether a click switches heads off and on
   */
  constructor(place, onClick, toggles = false) {
    Object.assign(this, { place, onClick, toggles, layers: [], cells: new Map(), shape: '' });
    // One tab stop, the cell that was last in focus; arrows move within, as in any grid.
    place.addEventListener('keydown', (event) => this.move(event));
    place.addEventListener('focusin', (event) => this.stopAt(event.target.closest('.cell')));
  }

  /** Build the tables, unless those there are have the same shape. */
  build(layers) {
    this.layers = layers;
    const shape = JSON.stringify(layers.map((layer) => [layer.key, layer.total]));
    if (shape === this.shape) return;
    this.shape = shape;
    this.cells.clear();
    const tables = ['head', 'block'].filter((what) => layers.some((layer) => layer.what === what));
    this.place.replaceChildren(...tables.map((what) => this.table(what)));
    this.place.classList.toggle('crowded', Math.max(0, ...layers.map((layer) => layer.total)) > 24);
    this.stop = null;
    this.stopAt(this.place.querySelector('.cell'));
  }

  stopAt(cell) {
    if (!cell) return;
    if (this.stop) this.stop.tabIndex = -1;
    this.stop = cell;
    cell.tabIndex = 0;
  }

  table(what) {
    const chosen = this.layers.filter((layer) => layer.what === what);
    const caption = what === 'block' ? 'blocks of hidden units or persistent vectors'
      : `${this.unit === 'kv_group' ? 'key/value groups' : 'heads'} of each layer`;
    return element('table', { className: 'heads' }, element('caption', {}, caption),
      element('tbody', {}, ...chosen.map((layer) => this.row(layer))));
  }

  row(layer) {
    const cells = Array.from({ length: layer.total }, (_, index) => {
      const cell = element('button', { type: 'button', className: 'cell', tabIndex: -1 });
      cell.dataset.key = layer.key;
      cell.dataset.index = index;
      cell.addEventListener('click', () => this.onClick(this.layers.find((l) => l.key === layer.key), index));
      return cell;
    });
    const count = element('td', { className: 'count' });
    this.cells.set(layer.key, { cells, count });
    return element('tr', {}, element('th', { scope: 'row' }, `layer ${layer.layer}`),
      ...cells.map((cell) => element('td', {}, cell)), count);
  }

  /**
   * Colour the cells.
   * @param {(layer: object, index: number) => {shade: number, stays: boolean, final?: boolean, off?: boolean,
   *   text: string}} look
   * @param {{key: string, index: number}} chosen the cell to mark
   */
  paint(look, chosen = null) {
    for (const layer of this.layers) {
      const { cells, count } = this.cells.get(layer.key);
      let stay = 0;
      cells.forEach((cell, index) => {
        const { shade, stays, final, off, text } = look(layer, index);
        stay += stays ? 1 : 0;
        cell.style.setProperty('--shade', shade);
        cell.classList.toggle('cut', !stays);
        cell.classList.toggle('final', Boolean(final));
        cell.classList.toggle('chosen', chosen !== null && chosen.key === layer.key && chosen.index === index);
        cell.textContent = stays ? '' : '×';
        cell.disabled = Boolean(off);
        if (this.toggles) cell.setAttribute('aria-pressed', String(stays));
        const name = `layer ${layer.layer}, ${layer.what} ${index}: ${text}`;
        cell.title = name;
        cell.setAttribute('aria-label', name);
      });
      count.textContent = `${stay}/${layer.total}`;
    }
  }

  move(event) {
    const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
    const cell = event.target.closest('.cell');
    if (!step || !cell) return;
    event.preventDefault();
    const row = this.layers.findIndex((layer) => layer.key === cell.dataset.key) + step[0];
    const layer = this.layers[row];
    if (!layer) return;
    const place = Math.min(Math.max(Number(cell.dataset.index) + step[1], 0), layer.total - 1);
    this.cells.get(layer.key).cells[place].focus();
  }
}
