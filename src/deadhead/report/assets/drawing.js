'use strict';
// Charts as SVG: panels in a grid, each with curves, points, bars or shaded cells, and a read-out of what is pointed at.

const SYMBOLS = {
  circle: 'M-4.5,0a4.5,4.5 0 1,0 9,0a4.5,4.5 0 1,0 -9,0z', ring: 'M-4.5,0a4.5,4.5 0 1,0 9,0a4.5,4.5 0 1,0 -9,0z',
  square: 'M-4,-4h8v8h-8z', diamond: 'M0,-5.5L5.5,0L0,5.5L-5.5,0z', cross: 'M-4.5,-4.5L4.5,4.5M-4.5,4.5L4.5,-4.5',
};
const DASHES = { dashed: '6 4', dotted: '1.5 3', dashdot: '6 3 1.5 3' };
const compact = new Intl.NumberFormat('en', { notation: 'compact', maximumSignificantDigits: 4 });
const exact = new Intl.NumberFormat('en', { maximumSignificantDigits: 5 });
const shortNumber = (value) => (Math.abs(value) >= 1e4 ? compact : exact).format(value);

function shape(tag, attributes = {}, ...children) {
  const made = document.createElementNS('http://www.w3.org/2000/svg', tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

/** Round values between two ends, at most about as many as asked for. */
function roundValues(low, high, most) {
  const rough = (high - low) / most;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((factor) => factor * power >= rough * (1 - 1e-9));
  const first = Math.ceil(low / step - 1e-9);
  return Array.from({ length: Math.floor(high / step + 1e-9) - first + 1 }, (_, place) => (first + place) * step);
}

/** Index of the entry of a sorted list that is closest to a value. */
function nearest(sorted, value) {
  let [low, high] = [0, sorted.length - 1];
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (sorted[middle] < value) low = middle; else high = middle;
  }
  return value - sorted[low] <= sorted[high] - value ? low : high;
}

/**
 * From values to pixels.
 * @param {{range?: number[], zero?: boolean, log?: boolean, ticks?: [number, string][], format?: Function}} asked
 * @param {number[]} values what must fit, where no range is asked for
 * @param {number} from pixel of the lowest value
 * @param {number} to pixel of the highest
 */
function makeAxis(asked, values, from, to) {
  const warp = asked.log ? Math.log10 : (value) => value;
  let [low, high] = asked.range || [Infinity, -Infinity];
  if (!asked.range) {
    for (const value of values) {
      if (!Number.isFinite(value) || (asked.log && value <= 0)) continue;
      low = Math.min(low, warp(value));
      high = Math.max(high, warp(value));
    }
    if (low > high) [low, high] = [0, 1];
    const fromZero = asked.zero && low >= 0;
    if (fromZero) low = 0;
    const room = (high - low || Math.abs(high) || 1) * 0.04;
    if (!fromZero) low -= room;
    high += room;
  }
  const at = (value) => from + (warp(value) - low) / (high - low) * (to - from);
  const ticks = (most) => {
    if (asked.ticks) return asked.ticks;
    let found = asked.log ? [] : roundValues(low, high, most);
    for (let power = Math.floor(low); asked.log && power <= high; power++) found.push(...[1, 2, 5].map((factor) => factor * 10 ** power));
    if (asked.log) found = found.filter((value) => warp(value) >= low && warp(value) <= high);
    return found.map((value) => [value, (asked.format || shortNumber)(value)]);
  };
  return { at, ticks, back: (pixel) => low + (pixel - from) / (to - from) * (high - low),
    fits: (value) => Number.isFinite(value) && (!asked.log || value > 0) };
}

/** Every n-th of some ticks, so that their labels have room. */
function withRoom(ticks, axis, room) {
  if (ticks.length < 2) return ticks;
  const stride = Math.ceil(room / Math.abs(axis.at(ticks[1][0]) - axis.at(ticks[0][0])) - 1e-6);
  return ticks.filter((_, place) => place % stride === 0);
}

function drawAxes(into, panel, box, x, y, shown) {
  const [right, floor] = [box.left + box.width, box.top + box.height];
  const short = (text) => text.length > 18 ? `${text.slice(0, 17)}…` : text;
  for (const [value, text] of withRoom(y.ticks(Math.max(2, box.height / 28)), y, 10)) {
    if (!panel.y.ticks) into.append(shape('path', { class: 'grid', d: `M${box.left},${y.at(value)}H${right}` }));
    if (shown.y) into.append(shape('g', { class: 'tick-y' }, shape('text', { x: box.left - 6, y: y.at(value), dy: '.35em' }, short(text))));
  }
  if (shown.x) {
    const all = x.ticks(Math.max(2, box.width / 80));
    const widest = Math.max(0, ...all.map(([, text]) => text.length));
    for (const [value, text] of withRoom(all, x, panel.x.turned ? 10 : 6.5 * widest + 8)) {
      const spot = panel.x.turned ? { transform: `translate(${x.at(value)},${floor + 6}) rotate(-90)`, dy: '.35em', class: 'turned' }
        : { x: x.at(value), y: floor + 16 };
      into.append(shape('g', { class: 'tick-x' }, shape('text', spot, short(text))));
    }
    if (panel.x.name) into.append(shape('text', { class: 'axis-name', x: right, y: floor + (panel.x.turned || 33) }, panel.x.name));
  }
  into.append(shape('path', { class: 'axis', d: `M${box.left},${floor}H${right}` }));
  if (panel.title) into.append(shape('text', { class: 'panel-title', x: box.left, y: box.top - 7 }, panel.title));
}

/** Shaded cells as one picture: a pixel each, as opaque as its value. */
function drawCells(into, cells, box, colour) {
  const canvas = Object.assign(document.createElement('canvas'), { width: cells.columns, height: cells.rows });
  const context = canvas.getContext('2d');
  context.fillStyle = colour;
  context.fillRect(0, 0, cells.columns, cells.rows);
  const picture = context.getImageData(0, 0, cells.columns, cells.rows);
  for (let row = 0, place = 3; row < cells.rows; row++) {
    for (let column = 0; column < cells.columns; column++, place += 4) picture.data[place] = cells.at(row, column);
  }
  context.putImageData(picture, 0, 0);
  into.append(shape('image', { class: 'cells', x: box.left, y: box.top, width: box.width, height: box.height,
    preserveAspectRatio: 'none', href: canvas.toDataURL() }));
}

function drawSeries(into, one, x, y) {
  const style = `--c: ${one.colour}`;
  if (one.line) {
    let path = '';
    let pen = 'M';
    one.x.forEach((value, place) => {
      if (!y.fits(one.y[place])) { pen = 'M'; return; }
      path += `${pen}${x.at(value).toFixed(1)},${y.at(one.y[place]).toFixed(1)}`;
      pen = 'L';
    });
    into.append(shape('path', { class: 'curve', d: path, style, 'stroke-width': one.width || 1.6, 'stroke-dasharray': DASHES[one.dash] || 'none' }));
  }
  one.x.forEach((value, place) => {
    const symbol = one.symbols ? one.symbols[place] : one.symbol;
    if (!symbol || !y.fits(one.y[place])) return;
    const spot = `translate(${x.at(value).toFixed(1)},${y.at(one.y[place]).toFixed(1)}) scale(${one.sizes ? one.sizes[place] : one.size || 1})`;
    const own = one.colours ? `--c: ${one.colours[place]}` : style;
    into.append(shape('path', { class: `symbol ${symbol}`, d: SYMBOLS[symbol], transform: spot, style: own }));
  });
}

function drawBars(into, bars, x, y) {
  bars.forEach((bar, row) => {
    const [begin, end] = [x.at(0), x.at(bar.value)];
    into.append(shape('rect', { class: 'bar', x: begin, y: y.at(row + 0.5) - 11, width: Math.max(0, end - begin), height: 22, rx: 3 }));
    const inside = end - begin > 60;
    into.append(shape('text', { class: inside ? 'bar-text inside' : 'bar-text', x: end + (inside ? -7 : 6), y: y.at(row + 0.5), dy: '.35em' }, bar.text));
  });
}

function drawPanel(into, panel, box, shown, sharedX, colour) {
  const series = panel.series || [];
  const x = makeAxis(panel.x, sharedX || series.flatMap((one) => one.x), box.left, box.left + box.width);
  const y = makeAxis(panel.y, series.flatMap((one) => one.y), box.top + box.height, box.top);
  if (panel.cells) drawCells(into, panel.cells, box, colour);
  drawAxes(into, panel, box, x, y, shown);
  for (const rule of panel.rules || []) into.append(shape('path', { class: 'rule', d: `M${x.at(rule)},${box.top}V${box.top + box.height}` }));
  drawBars(into, panel.bars || [], x, y);
  for (const one of series) drawSeries(into, one, x, y);
  for (const label of panel.labels || []) {
    const over = x.at(label.x) + 6.4 * label.text.length > box.left + box.width;
    const spot = label.line === undefined ? { x: x.at(label.x) - 7, y: y.at(label.y) + (label.above ? -7 : 15), 'text-anchor': 'end' }
      : { x: x.at(label.x) + (over ? -3 : 3), y: 12 + 14 * label.line, 'text-anchor': over ? 'end' : 'start' };
    into.append(shape('text', { class: 'label', ...spot }, label.text));
  }
  return (px, py) => {
    if (panel.cells) {
      const { rows, columns, say } = panel.cells;
      const row = Math.min(rows - 1, Math.max(0, Math.floor((py - box.top) / box.height * rows)));
      const column = Math.min(columns - 1, Math.max(0, Math.floor((px - box.left) / box.width * columns)));
      const size = [box.width / columns, box.height / rows];
      return { x: box.left + column * size[0], y: box.top + row * size[1], width: size[0], height: size[1], text: say(row, column), row };
    }
    if (panel.bars) {
      const row = Math.min(panel.bars.length - 1, Math.max(0, Math.floor((py - box.top) / box.height * panel.bars.length)));
      return { x: x.at(panel.bars[row].value) - 6, y: y.at(row + 0.5) - 6, width: 12, height: 12, text: panel.bars[row].say };
    }
    let best = null;
    let least = Infinity;
    for (const one of series) {
      const close = one.line ? nearest(one.x, x.back(px)) : 0;
      const last = one.line ? close : one.x.length - 1;
      for (let place = close; place <= last; place++) {
        if (!y.fits(one.y[place])) continue;
        const spot = [x.at(one.x[place]), y.at(one.y[place])];
        const distance = Math.hypot(spot[0] - px, spot[1] - py);
        if (distance < least) { least = distance; best = { x: spot[0] - 6, y: spot[1] - 6, width: 12, height: 12, text: one.say(place) }; }
      }
    }
    return best;
  };
}

function legendOf(chart) {
  const entries = new Map(chart.panels.flatMap((panel) => panel.series || []).filter((one) => one.legend).map((one) => [one.legend, one]));
  const marks = [...entries].map(([name, one]) => element('span', {}, shape('svg', { class: 'sample', viewBox: '-14 -7 28 14', style: `--c: ${one.colour}` },
    ...(one.line ? [shape('path', { class: 'curve', d: 'M-13,0H13', 'stroke-width': 2, 'stroke-dasharray': DASHES[one.dash] || 'none' })] : []),
    ...(one.symbol ? [shape('path', { class: `symbol ${one.symbol}`, d: SYMBOLS[one.symbol] })] : [])), name));
  return element('div', { className: 'legend' }, ...marks);
}

/**
 * Put a chart's legend and its empty drawing into an element, so that it is as high as it will be once it is drawn.
 * @param {HTMLElement} place
 * @param {object} chart as for drawChart
 * @returns the empty drawing and the places in it, or null where there is only a note
 */
function outlineChart(place, chart) {
  if (!chart.panels.length) {
    place.replaceChildren(shape('svg', { class: 'drawing', viewBox: '0 0 600 60' }),
      element('p', { className: 'note' }, chart.note));
    return null;
  }
  const { left = 56, right = 14, top = 24, bottom = 40 } = chart.margin || {};
  const width = place.clientWidth || 600;
  const perRow = Math.max(1, Math.min(chart.panels.length, chart.perRow ? chart.perRow(width) : 1));
  const rows = Math.ceil(chart.panels.length / perRow);
  const gap = chart.sharedX ? 28 : top + bottom;
  const height = top + rows * chart.panelHeight + (rows - 1) * gap + bottom;
  const each = (width - left - right - 12 * (perRow - 1)) / perRow;
  const drawing = shape('svg', { class: 'drawing', viewBox: `0 0 ${width} ${height}` });
  place.replaceChildren(legendOf(chart), drawing);
  const boxes = chart.panels.map((_, number) => {
    const [row, column] = [Math.floor(number / perRow), number % perRow];
    return { left: left + column * (each + 12), top: top + row * (chart.panelHeight + gap), width: each, height: chart.panelHeight,
      shown: { x: !chart.sharedX || row === rows - 1, y: column === 0 } };
  });
  return { drawing, boxes, width };
}

/**
 * Draw a chart into an element, as wide as that is.
 * @param {HTMLElement} place
 * @param {object} chart its `panels`, their height, the `margin` around them, how many stand side by side (`perRow`), and
 *   whether they share the axis below them (`sharedX`); where there are none, `note`
 * @param {(row: number) => void} pick called with the row of cells that is clicked
 */
function drawChart(place, chart, pick) {
  const outline = outlineChart(place, chart);
  if (!outline) return;
  const { drawing, boxes, width } = outline;
  const sharedX = chart.sharedX ? chart.panels.flatMap((panel) => [...panel.series.flatMap((one) => one.x), ...(panel.rules || [])]) : null;
  const colour = getComputedStyle(place).getPropertyValue('--kept').trim();
  const finders = chart.panels.map((panel, number) => {
    const box = boxes[number];
    return { box, find: drawPanel(drawing, panel, box, box.shown, sharedX, colour) };
  });
  const mark = shape('rect', { class: 'mark', rx: chart.panels[0].cells ? 0 : 6, visibility: 'hidden' });
  drawing.append(mark);
  const readout = element('div', { className: 'readout', hidden: true });
  const found = (event) => {
    const shown = drawing.getBoundingClientRect();
    const [px, py] = [(event.clientX - shown.left) * width / shown.width, (event.clientY - shown.top) * width / shown.width];
    const under = finders.find(({ box }) => px >= box.left - 6 && px <= box.left + box.width + 6 && py >= box.top - 10 && py <= box.top + box.height + 10);
    return under ? under.find(px, py) : null;
  };
  const point = (event) => {
    const spot = event.type === 'pointerleave' ? null : found(event);
    mark.setAttribute('visibility', spot ? 'visible' : 'hidden');
    readout.hidden = !spot;
    if (!spot) return;
    for (const name of ['x', 'y', 'width', 'height']) mark.setAttribute(name, spot[name]);
    readout.textContent = spot.text;
    readout.style.left = `${Math.max(0, Math.min(spot.x + spot.width + 8, width - readout.offsetWidth))}px`;
    const above = drawing.getBoundingClientRect().top - place.getBoundingClientRect().top + spot.y - readout.offsetHeight - 6;
    readout.style.top = `${Math.max(0, above)}px`;
  };
  for (const kind of ['pointermove', 'pointerdown', 'pointerleave']) drawing.addEventListener(kind, point);
  if (pick) drawing.addEventListener('click', (event) => { const spot = found(event); if (spot) pick(spot.row); });
  place.append(readout);
}
