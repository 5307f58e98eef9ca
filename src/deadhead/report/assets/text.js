'use strict';
// Numbers and elements. Text of a run gets into the page through textContent alone.

const number = new Intl.NumberFormat('en');
const percent = new Intl.NumberFormat('en', { style: 'percent', maximumFractionDigits: 1 });

function digits(value, most = 4) {
  if (value === null || value === undefined) return '–';
  return Math.abs(value) >= 1000 ? number.format(Math.round(value)) : Number(value.toPrecision(most)).toString();
}

/** Make an element with properties, attributes (those with a dash) and children; a string child becomes text. */
function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.includes('-') || name === 'role' || name === 'scope') made.setAttribute(name, value);
    else made[name] = value;
  }
  made.append(...children);
  return made;
}

/** Let a select offer the models of some names; the one that is chosen stays. */
function offer(select, names) {
  if (names.join() === [...select.options].map((option) => option.value).join()) return;
  const chosen = select.value;
  select.replaceChildren(...names.map((name) => element('option', { value: name, selected: name === chosen }, STAGES[name] || name)));
}

function bytes(base64) {
  return Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
}

/** A table of rows of values, for those who read numbers or hear them. */
function numbersTable(caption, columns, rows, most = 400) {
  // Of very long tables every n-th row: a table of all of them could not be read.
  const stride = Math.max(1, Math.ceil(rows.length / most));
  const shown = rows.filter((_, place) => place % stride === 0 || place === rows.length - 1);
  return element('table', { className: 'numbers' },
    element('caption', {}, stride > 1 ? `${caption} (every ${stride}th row)` : caption),
    element('thead', {}, element('tr', {}, ...columns.map((name) => element('th', { scope: 'col' }, name)))),
    element('tbody', {}, ...shown.map((row) => element('tr', {},
      ...row.map((value, place) => place
        ? element('td', {}, typeof value === 'number' ? digits(value) : value ?? '–')
        : element('th', { scope: 'row' }, String(value)))))));
}
